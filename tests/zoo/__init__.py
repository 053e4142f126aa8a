"""Small models made to disagree: what a server may get wrong about each, and what plain torch answers.

Read in this order: `case` (what a model of the zoo is), the files of models by kind (`shapes`, `control_flow`, ...),
`reference` (what is right), `packing`, `asking`, `judging`, `trial` (one model through one server), `correctness` (the
command that writes docs/correctness.md).
"""
