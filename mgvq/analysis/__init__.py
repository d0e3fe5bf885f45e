"""From finished runs to a report; it runs no model.

records     what is kept of a study's runs (`StudyRecord`), and how it is collected from run folders
statistics  what arms are compared by, how they are compared, and what a study can find
tables      Markdown, CSV and LaTeX
figures     SVG
verdict.py  what a study found, in sentences
report.py   the lists of all tables and figures, and the files they become; html.py and examples.py make a page of them
"""
