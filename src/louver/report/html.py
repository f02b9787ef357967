"""An audit as one HTML page: `render` makes the text, `write_report` puts it on disk whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from louver.errors import DataError, MissingExtraError
from louver.report import words
from louver.storage import write_bytes
from louver.types import Audit, Cut, HalfCost, Panel, Row

try:
    import jinja2
    from markupsafe import Markup

    from louver.report import figures
except ImportError as error:  # pragma: no cover - the lab extra is always there in tests
    raise MissingExtraError("reports need the lab extra: pip install 'louver[lab]'") from error

__all__ = ["environment", "render", "write_report"]

N_MAIN_CHARTS = 4
"""So many measures are drawn in the open; the rest is one click away."""

N_OPEN_CUTS = 6
"""Up to this many cuts all pictures are in the open."""

COLUMNS = 8
"""Pictures side by side: more would not fit on a printed page."""


# ---------------------------------------------------------------- what the template is handed


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cut as the page names it; `cut` is None where rows name a cut that the audit does not list.

    `title` heads tables and sections, `mark` stands under the drawings.
    """

    anchor: str
    name: str
    title: str
    mark: str
    cut: Cut | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the tables, in words."""

    attack: str
    mean: str
    interval: str
    worst: str
    worst_interval: str
    floor: str
    floor_interval: str
    floor_worst: str
    beats_floor: bool
    n_images: str
    seconds: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """All attacks by one measure at one cut."""

    label: str
    heading: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class PlaceBlocks:
    """All that was found at one cut, the main measure apart."""

    place: Place
    main: Block
    others: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Glance:
    """The strongest attack at one cut."""

    place: Place
    attack: str
    line: Line | None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing and its numbers: `table` holds a line per cut, a cell per column, each cell a value and small print."""

    title: str
    note: str
    drawing: Markup
    columns: tuple[str, ...]
    table: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture in a grid."""

    uri: str
    alt: str
    width: int
    height: int
    is_enlarged: bool


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Some columns of a panel: rows of (name, pictures), a caption under each column."""

    heading: str
    rows: tuple[tuple[str, tuple[Picture, ...]], ...]
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlaceGrids:
    """All pictures of one cut."""

    place: Place
    grids: tuple[Grid, ...]
    is_open: bool


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """One cut in the cost tables."""

    place: Place
    shape: str
    dtype: str
    feature_bytes: str
    edge: tuple[str, ...]
    cloud: tuple[str, ...]


# ---------------------------------------------------------------- rows in words


def _line(row: Row) -> Line:
    say = partial(words.value_in_words, row.measure, row.unit)

    def between(low: float, high: float) -> str:
        return f"{say(low)} to {say(high)}"

    return Line(
        attack=row.attack,
        mean=say(row.mean),
        interval=between(row.low, row.high),
        worst=say(row.worst),
        worst_interval=between(row.worst_low, row.worst_high),
        floor=say(row.floor),
        floor_interval=between(row.floor_low, row.floor_high),
        floor_worst=say(row.floor_worst),
        beats_floor=row.beats_floor,
        n_images=f"{row.n_images:,}",
        seconds=words.seconds_in_words(row.seconds),
    )


def _heading(row: Row) -> str:
    measure = words.measure_words(row.measure)
    unit = row.unit if measure.style in {"decibel", "free"} and row.unit not in {"", "1"} else ""
    return f"{measure.label}{f' ({unit})' if unit else ''}, {words.direction_in_words(row)}"


def _places(audit: Audit) -> list[Place]:
    """The cuts in network order, then any that only rows name: nothing that was found may go missing."""
    listed: dict[str, Cut | None] = {cut.name: cut for cut in audit.cuts}
    for row in audit.rows:
        listed.setdefault(row.cut, None)
    # Names too long to stand under a drawing give way to numbers there, and carry them everywhere else.
    is_numbered = any(len(name) > figures.MARK_LENGTH for name in listed)
    return [
        Place(
            anchor=f"cut-{i}",
            name=name,
            title=f"{i}. {name}" if is_numbered else name,
            mark=str(i) if is_numbered else name,
            cut=cut,
        )
        for i, (name, cut) in enumerate(listed.items(), start=1)
    ]


def _block(rows: Sequence[Row]) -> Block:
    label = words.measure_words(rows[0].measure).label
    return Block(label=label, heading=_heading(rows[0]), lines=tuple(_line(row) for row in rows))


def _found(audit: Audit, places: Sequence[Place], measures: Sequence[str]) -> list[PlaceBlocks]:
    found = []
    for place in places:
        blocks = [
            _block(rows)
            for measure in measures
            if (rows := [row for row in audit.rows if row.cut == place.name and row.measure == measure])
        ]
        if blocks:
            found.append(PlaceBlocks(place=place, main=blocks[0], others=tuple(blocks[1:])))
    return found


def _strength(row: Row) -> float:
    """A key that grows with leakage; a mean that is not a number sorts last rather than anywhere."""
    if math.isnan(row.mean):
        return -math.inf
    return row.mean if row.leaks_when == "high" else -row.mean


def _glances(audit: Audit, places: Sequence[Place], measure: str) -> list[Glance]:
    glances = []
    for place in places:
        rows = [row for row in audit.rows if row.cut == place.name and row.measure == measure]
        best = max(rows, key=_strength, default=None)
        glances.append(
            Glance(place=place, attack=best.attack if best else "not attacked", line=_line(best) if best else None)
        )
    return glances


# ---------------------------------------------------------------- charts


def _floor_of(rows: Sequence[Row]) -> Row | None:
    """The row whose floor is drawn: that of the most images."""
    return max(rows, key=lambda row: row.n_images, default=None)


def _point(row: Row | None) -> figures.Point | None:
    return figures.Point(value=row.mean, low=row.low, high=row.high) if row else None


def _leakage_chart(number: int, audit: Audit, places: Sequence[Place], attacks: Sequence[str], measure: str) -> Chart:
    rows = [row for row in audit.rows if row.measure == measure]
    at = {(row.cut, row.attack): row for row in rows}
    floors = [_floor_of([row for row in rows if row.cut == place.name]) for place in places]
    series = [
        figures.Series(name=attack, points=tuple(_point(at.get((place.name, attack))) for place in places))
        for attack in attacks
    ]
    say = partial(words.value_in_words, measure, rows[0].unit)
    heading = _heading(rows[0])
    style = words.measure_words(measure).style
    drawing = figures.line_chart(
        identifier=f"leakage-{number}",
        title=f"Mean {heading}, over the cuts in network order",
        description=f"One line for each of {len(attacks)} attacks with its 95 % interval, and the floor. "
        "The table below the drawing holds the same numbers.",
        places=[place.mark for place in places],
        series=series,
        number=say,
        floor=[row.floor if row else None for row in floors],
        span=(0.0, 1.0) if style in {"share", "unit"} else None,
    )
    table = []
    for place, floor in zip(places, floors, strict=True):
        cells = [
            (line.mean, line.interval) if (row := at.get((place.name, attack))) and (line := _line(row)) else ("–", "")
            for attack in attacks
        ]
        cells.append((_line(floor).floor, _line(floor).floor_interval) if floor else ("–", ""))
        table.append((place.title, tuple(cells)))
    return Chart(
        title=f"Mean {heading.split(',')[0]}",
        note=words.direction_in_words(rows[0]),
        drawing=drawing,
        columns=(*attacks, "Floor"),
        table=tuple(table),
    )


def _cost_charts(places: Sequence[Place]) -> list[Chart]:
    cuts = [place.cut for place in places if place.cut]
    count, size = words.count_in_words, words.bytes_in_words
    told = (
        ("Arithmetic on the device", "MACs for one picture", count, 1000, [cut.cost.edge.macs for cut in cuts]),
        ("Sent to the cloud", "feature bytes for one picture", size, 1024, [cut.cost.feature_bytes for cut in cuts]),
        ("Parameters on the device", "count", count, 1000, [cut.cost.edge.parameters for cut in cuts]),
    )
    return [
        Chart(
            title=title,
            note=note,
            drawing=figures.line_chart(
                identifier=f"cost-{number}",
                title=f"{title}, over the cuts in network order",
                description=f"One line: {note}. The table of costs holds the same numbers.",
                places=[place.mark for place in places if place.cut],
                series=[figures.Series(name=title, points=tuple(figures.Point(value=value) for value in values))],
                number=say,
                base=base,
                span=(0.0, 0.0),
                is_labeled=False,
            ),
            columns=(),
            table=(),
        )
        for number, (title, note, say, base, values) in enumerate(told, start=1)
    ]


# ---------------------------------------------------------------- pictures


def _check_panel(panel: Panel) -> None:
    for attack, pictures in panel.attacks.items():
        if len(pictures) != len(panel.truth):
            raise DataError(
                f"panel {panel.title!r} at {panel.cut}: expected {len(panel.truth)} pictures of {attack}, "
                f"one under each true picture, got {len(pictures)}"
            )
    if len(panel.captions) != len(panel.truth):
        raise DataError(
            f"panel {panel.title!r} at {panel.cut}: expected {len(panel.truth)} captions, one under each picture, "
            f"got {len(panel.captions)}"
        )


def _grids(panel: Panel) -> list[Grid]:
    _check_panel(panel)
    strips = {"True picture": panel.truth, **panel.attacks}
    # Fewer columns leave room for larger pictures.
    wish = 128 if len(panel.truth) <= 6 else 96
    grids = []
    # Ten pictures are five and five, not eight and two.
    n_grids = math.ceil(len(panel.truth) / COLUMNS)
    across = math.ceil(len(panel.truth) / n_grids) if n_grids else 1
    for start in range(0, len(panel.truth), across):
        columns = range(start, min(start + across, len(panel.truth)))
        rows = []
        for name, strip in strips.items():
            pictures = []
            for column in columns:
                height, width = strip.shape[1:3]
                shown_height, shown_width = figures.picture_size(height, width, wish=wish)
                what = name if name == "True picture" else f"Rebuilt by {name}"
                pictures.append(
                    Picture(
                        uri=figures.picture_uri(strip[column]),
                        alt=f"{what}: {panel.captions[column]}",
                        width=shown_width,
                        height=shown_height,
                        is_enlarged=shown_width > width,
                    )
                )
            # A name with spaces breaks between words in its narrow column.
            rows.append((name.replace("_", " "), tuple(pictures)))
        part = f", {columns[0] + 1} to {columns[-1] + 1} of {len(panel.truth)}" if len(panel.truth) > COLUMNS else ""
        captions = tuple(panel.captions[column] for column in columns)
        grids.append(Grid(heading=panel.title + part, rows=tuple(rows), captions=captions))
    return grids


def _place_grids(panels: Sequence[Panel], places: Sequence[Place]) -> list[PlaceGrids]:
    known = [place.name for place in places]
    extra = [name for name in dict.fromkeys(panel.cut for panel in panels) if name not in known]
    unlisted = [
        Place(anchor=f"pictures-{i}", name=name, title=name, mark=name, cut=None) for i, name in enumerate(extra)
    ]
    everywhere = [*places, *unlisted]
    told = [(place, [panel for panel in panels if panel.cut == place.name]) for place in everywhere]
    told = [(place, own) for place, own in told if own]
    return [
        PlaceGrids(
            place=place,
            grids=tuple(grid for panel in own for grid in _grids(panel)),
            # The shallowest and the deepest cut tell the story when there are too many to show.
            is_open=len(told) <= N_OPEN_CUTS or index in (0, len(told) - 1),
        )
        for index, (place, own) in enumerate(told)
    ]


# ---------------------------------------------------------------- cost, config, the whole


def _half(half: HalfCost, *, has_latency: bool) -> tuple[str, ...]:
    told = (
        words.count_in_words(half.macs),
        words.count_in_words(half.parameters),
        words.bytes_in_words(half.weight_bytes),
        words.bytes_in_words(half.peak_activation_bytes),
    )
    if not has_latency:
        return told
    latency = half.latency
    if latency is None:
        return (*told, "not measured")
    return (*told, f"{latency.median_ms:.2f} ({latency.p10_ms:.2f} to {latency.p90_ms:.2f})")


def _has_latency(cuts: Sequence[Cut]) -> bool:
    return any(half.latency for cut in cuts for half in (cut.cost.edge, cut.cost.cloud))


def _shape(cut: Cut) -> str:
    return "×".join(str(size) for size in cut.feature_shape)


def _costs(places: Sequence[Place]) -> list[CostLine]:
    has_latency = _has_latency([place.cut for place in places if place.cut])
    return [
        CostLine(
            place=place,
            shape=_shape(place.cut),
            dtype=place.cut.dtype,
            feature_bytes=words.bytes_in_words(place.cut.cost.feature_bytes),
            edge=_half(place.cut.cost.edge, has_latency=has_latency),
            cloud=_half(place.cut.cost.cloud, has_latency=has_latency),
        )
        for place in places
        if place.cut
    ]


def _plain(value: object) -> object:
    """A value that JSON cannot hold, as one that it can: sets in order, the rest as text."""
    if isinstance(value, (set, frozenset)):
        return sorted(str(member) for member in value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _picture_bytes(panels: Sequence[Panel]) -> str | None:
    return words.bytes_in_words(panels[0].truth[0].nbytes) if panels and len(panels[0].truth) else None


def environment() -> jinja2.Environment:
    """What turns the templates of this folder into text; everything that is put in is escaped."""
    folder = resources.files("louver.report")
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
    )


def render(audit: Audit, panels: Sequence[Panel] = ()) -> str:
    """The whole page, as text: one file that needs no other and runs no script.

    Every number comes from `audit` as it stands. Panels appear under their cut, in the order given.

    Raises:
        DataError: a panel whose pictures and captions do not match, or a picture that is not uint8.
    """
    places = _places(audit)
    measures = words.by_importance([row.measure for row in audit.rows])
    attacks = list(dict.fromkeys(row.attack for row in audit.rows))
    status = words.status_of(audit.verdict)
    cuts = [place.cut for place in places if place.cut]
    charts = [_leakage_chart(i, audit, places, attacks, measure) for i, measure in enumerate(measures, start=1)]
    folder = resources.files("louver.report")
    return (
        environment()
        .get_template("report.html")
        .render(
            audit=audit,
            style=Markup((folder / "report.css").read_text(encoding="utf-8")),
            status=status,
            status_words=words.STATUS_WORDS[status],
            n_images=" or ".join(f"{n:,}" for n in sorted({row.n_images for row in audit.rows})),
            defenses=", ".join(dict.fromkeys(finding.defense for finding in audit.findings)),
            seeds=", ".join(str(seed) for seed in sorted({finding.seed for finding in audit.findings})),
            places=places,
            shape=_shape,
            attacks=attacks,
            keys=[figures.series_key(i) for i in range(len(attacks))],
            main_heading=_heading(next(row for row in audit.rows if row.measure == measures[0])) if measures else "",
            glances=_glances(audit, places, measures[0]) if measures else [],
            found=_found(audit, places, measures),
            charts=charts[:N_MAIN_CHARTS],
            more_charts=charts[N_MAIN_CHARTS:],
            cost_charts=_cost_charts(places) if cuts else [],
            costs=_costs(places),
            has_latency=_has_latency(cuts),
            picture_bytes=_picture_bytes(panels),
            pictures=_place_grids(panels, places),
            grants=words.threat_grants(audit.threat),
            withholds=words.threat_withholds(audit.threat),
            limits=words.limits(audit),
            utility=[(name, words.utility_in_words(name, value)) for name, value in audit.utility.items()],
            glossary=[(name, words.measure_words(name)) for name in measures],
            terms=words.TERMS,
            seconds=words.seconds_in_words(audit.seconds),
            config=json.dumps(dict(audit.config), indent=2, ensure_ascii=False, default=_plain),
        )
    )


def write_report(audit: Audit, panels: Sequence[Panel], path: Path) -> Path:
    """`path`, once the page of `audit` is there whole: a reader never finds half a report, nor loses the one before.

    Raises:
        DataError: as `render`.
        StorageError: the disk refused; what was at `path` before is untouched.
    """
    # A name that came from an undecodable file name cannot be UTF-8; the report must not be lost for it.
    page = render(audit, panels).encode("utf-8", errors="backslashreplace")
    return write_bytes(path, page)
