"""Nearest points of products `y = B(x, w)`.

`operation`, `dot_general` and `convolution` say what `B` is. `compact` keeps one value for all
copies of an entry, `lifted` all copies, and `pinned` projects where one factor is known.
"""
