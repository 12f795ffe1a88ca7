"""Simulated images whose truth is known: chest radiographs, H&E tissue, and cohorts of patients drawn from
them.
"""
