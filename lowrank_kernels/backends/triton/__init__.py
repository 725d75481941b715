"""placeholder"""

raise ImportError("not built")
