"""What a person reads: the page (page, charts, page.html) and tables for a terminal (tables).

Nothing is computed here that is not in a JSON file.
"""
