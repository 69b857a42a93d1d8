"""Nearest points: pure mathematics on arrays, with no knowledge of graphs.

Every projection is in deviation form. A node `y = f(x)` comes with reference inputs and the
reference output `y_ref = f(x_ref)` of a forward pass; what moves is the deviation from it. Given
input deviations `dx`, a target deviation `dz` for the output, and weights `ρ` and `W`, a projection
returns the new deviations that minimise `Σ ρ (dx' − dx)² + Σ W (dy' − dz)²` subject to
`y_ref + dy' = f(x_ref + dx')`. Deviations may be 1e-10 of the references, so they are never
computed as differences of full values.
"""
