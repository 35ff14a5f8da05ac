"""Networks, their parts, codecs between raw data and state spaces, and official weights."""

from .mmdit import MMDiT
from .streams import Patches, Stream, Tokens
from .table_dit import Categorical, Numerical, TableDiT

__all__ = ["Categorical", "MMDiT", "Numerical", "Patches", "Stream", "TableDiT", "Tokens"]
