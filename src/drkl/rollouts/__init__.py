"""Answers that are sampled while training goes on, in place of the data's responses.

`config` says which rows are answered so, and by whom; `builtin` and `server` write the answers, `memory` keeps earlier
ones, `stops` checks beforehand that both models mean the same by a finished answer, `health` says when the student's
answers are going wrong.
"""
