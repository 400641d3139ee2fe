"""What a run left behind, made readable: one page, or Markdown, or JSON, or a trace.

Data flows one way: `load` (files → typed records and a list of problems) → `view` and its parts (pure: what is to
be shown, in plain values) → `page`, `markdown` (how it looks). Nothing here imports the watch: a report is made of
files, also of those that a run on another machine left behind.
"""
