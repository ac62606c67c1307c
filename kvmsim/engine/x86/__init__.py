"""Guests that are real x86 code, executed by Unicorn (the optional extra ``x86``)."""
