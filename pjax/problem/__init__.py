"""TODO pjax/problem."""
