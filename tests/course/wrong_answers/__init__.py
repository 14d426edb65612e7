"""Plausible wrong answers to the exercises, one file a chapter: the checks must recognise each by name.

`chapter_04.py` holds `WRONG = {"4.1": [("name-of-the-mistake", "code that replaces the stub"), …], …}`.
These files stay out of the student edition.
"""
