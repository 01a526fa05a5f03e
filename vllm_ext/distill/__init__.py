# SPDX-License-Identifier: Apache-2.0
"""Make a small draft model for a target: a few of its layers, distilled on its own text.

`texts` reads what the target is asked, `teacher` lets it write and keeps its distributions,
`student` cuts the draft out, `loss` and `train` distil it, `evaluate` says how much would be
accepted, and `run` does all of it in an order that a kill at any moment does not disturb.
"""
