"""TODO pjax/patterns/losses."""
