"""Tables: markdown, csv and TeX from records."""
