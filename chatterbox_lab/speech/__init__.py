"""Text of any length: cut into utterances, made speakable, spoken as one stream.

Read `speak`, then `sentences`, then `spoken`.
"""
