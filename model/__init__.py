"""Networks, their parts, codecs between raw data and state spaces, and official weights."""

from .mmdit import MMDiT, Patches, Tokens
from .table_dit import Categories, Numbers, TableDiT

__all__ = ["Categories", "MMDiT", "Numbers", "Patches", "TableDiT", "Tokens"]
