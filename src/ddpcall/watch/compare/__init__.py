"""Vitals of sampled steps, and what comes of comparing them between ranks."""
