# SPDX-License-Identifier: Apache-2.0
"""Small tasks that are made on the spot, each with a warm-started model that has room to learn.

``task.py`` says what a task is, ``addition.py``, ``arithmetic.py``, ``science.py`` and ``dialogue.py`` are one task
each, and ``registry.py`` lists them. ``prepare.py`` makes a folder of data and model from them.
"""
