"""Answers that are sampled while training goes on, in place of the data's responses.

`config` says which rows are answered so, and by whom; `steps` gives the rows of each step and keeps earlier answers,
`asking` has the answers written, by `builtin` or by `server`; `stops` checks beforehand that both models mean the same
by a finished answer, `health` says when the student's answers are going wrong.
"""
