"""What is shown of a model before its answers are believed.

Inputs made to disagree, comparisons, the rules of compiled code.
"""
