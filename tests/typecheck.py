"""How the tests check annotations: beartype, with an int accepted where a float is annotated."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
