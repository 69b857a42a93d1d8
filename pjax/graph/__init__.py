"""TODO pjax/graph."""
