"""TODO pjax/trace."""
