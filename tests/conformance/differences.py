"""Oracle rows that a mounted file system cannot answer as Linux does, each with its reason.

row -> label -> reason. The label is that of one observation; the rest of the row still has to
agree. The label "*" stands for the whole row.
"""

DIFFERENCES: dict[int, dict[str, str]] = {}
