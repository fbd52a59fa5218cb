"""Does this package compute and train what a Hugging Face folder holds? One check after another, and what each saw.

`family_checks.verify` makes them, `findings.Report` holds them, `tools/verify_family.py` prints them.
"""
