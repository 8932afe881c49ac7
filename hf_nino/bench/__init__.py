"""Benchmarks: what nowcasts cost (:mod:`.engine`) and what they bring (:mod:`.training`)."""
