"""What a defense is: surgery before training, pressure during it, and a clean end.

`louver.harden` calls, in this order: `operate` (surgery; the split keeps computing), training under
`pressure(is_mending=False)`, `finish` (what was soft becomes hard: prune, fit, freeze), and, for the last `mending`
share of the epochs, training under `pressure(is_mending=True)`. What comes out is an ordinary `Split`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from louver.cut import Split
from louver.types import Images

__all__ = ["Batch", "Defense", "FrozenEdge", "Pressure"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step of training as a defense sees it.

    `images` (n, c, h, w) in [0,1]; `features` what the edge made of them, float32, with gradients; `outputs` the
    cloud's answers, float32; `targets` the task's, one row an image; `done` the share of this stage that is over;
    `autocast` a context in which networks compute as fast as training does (bfloat16 where that is fast).
    """

    images: Float[Tensor, "n c h w"]
    features: Tensor
    outputs: Tensor
    targets: Tensor
    done: float = 0.0
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


class Pressure(nn.Module):
    """What a defense does while a split is trained; this one does nothing.

    `task_weight` scales the task's loss, `label_smoothing` replaces the training's own when not None. With
    `freezes_edge` the edge is left as it is: no gradients, evaluation mode. A pressure may own an adversary and its
    optimizer; `held` and `hold` carry what is not in `state_dict` through a checkpoint, so that a stopped run goes on
    bit for bit.
    """

    task_weight: float = 1.0
    label_smoothing: float | None = None
    freezes_edge: bool = False

    def before(self, split: Split, batch: Batch) -> None:
        """Work of its own, such as a step of an adversary, before the split takes its step; detach what you use."""

    def terms(self, split: Split, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms by name; they join the task's loss. Every one is a finite scalar with gradients."""
        return {}

    def after(self, split: Split, *, learning_rate: float) -> None:
        """Work after the split's step, such as a proximal step on masks."""

    def held(self) -> dict[str, Tensor]:
        """Tensors to keep in a checkpoint beside `state_dict()`."""
        return {}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `held` gave."""


class FrozenEdge(Pressure):
    """Only the cloud learns."""

    freezes_edge = True


class Defense:
    """A way to make features tell less. Subclasses are frozen, keyword-only dataclasses of knobs, and final."""

    @property
    def mending(self) -> float:
        """Share of the epochs, from 0 to below 1, that follow `finish`."""
        return 0.0

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """A new split with what the defense adds, weights carried over; `split` is left untouched.

        `images` and `targets` are those that the split will be trained on.
        """
        return split

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """What acts while `split` (as `operate` or `finish` made it) is trained; may look at shapes, not train."""
        return Pressure()

    def finish(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """A new split in its final structure; `split` is left untouched."""
        return split

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """`split` (undefended, as first cut) in the structure that `finish` left, for `state` to be loaded into.

        `state` is the `state_dict` of the finished split; its shapes and keys say what pruning left. Numbers need not
        be right, since the caller loads them.
        """
        return split
