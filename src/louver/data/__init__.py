"""Pictures in [0,1] with labels, and the roles that keep them apart."""

from louver.data.packed import DATA_NAMES
from louver.data.readers import data_root, load_images
from louver.data.roles import assign_roles, drop_overlap
from louver.data.sheet import contact_sheet
from louver.data.streets import streets

__all__ = ["DATA_NAMES", "assign_roles", "contact_sheet", "data_root", "drop_overlap", "load_images", "streets"]
