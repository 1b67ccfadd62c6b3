# SPDX-License-Identifier: Apache-2.0
"""Everything that ties this package to the insides of verl, vLLM and Ray, in one table with a check.

``table`` lists each function of theirs that we wrap, replace, override, register with or call by position. ``apply``
puts the changes in place from that table. ``fingerprints`` compares the source of each with what the table was written
against:

    python -m verl_dvpo.compat check                 # the installed verl, vLLM and Ray
    python -m verl_dvpo.compat check --verl PATH     # any source tree of verl
    python -m verl_dvpo.compat table                 # the table, as Markdown

Nothing here imports another part of this package: functions of upper layers are named by strings in the table.
"""
