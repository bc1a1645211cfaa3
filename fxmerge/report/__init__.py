"""The reports of an analysis and of a merge: tables, JSON and pictures.

group_data   what the reports say about one group or one refusal, as plain data
refusals     the parameters held back by channels that cannot be merged
budget_line  what is left of a model, compared with its budget
points       the points of a sweep, as a table, a plot and JSON
operations   the operations that nodes compute, by the names that users know
layout       tables and paragraphs as plain text of a given width
tables       the tables of a report
drawable     what all reports have in common: the formats that they can be drawn in
reports      the reports of an analysis and of a merge
picture      pictures of a network and its groups
"""
