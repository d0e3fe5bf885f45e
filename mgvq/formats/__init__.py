"""How a quantised weight is stored: packed codes with their tables, one class a format. A leaf package."""
