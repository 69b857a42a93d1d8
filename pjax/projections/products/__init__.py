"""TODO pjax/projections/products."""
