# SPDX-License-Identifier: Apache-2.0
"""Says of a task if a critic can matter on it, before algorithms are compared there.

``rollouts.py`` samples a policy, ``fit.py`` fits a critic to rollouts, ``variance.py`` measures what critics explain,
``comparison.py`` reads a study's runs, ``report.py`` and ``figures.py`` write the result.
"""
