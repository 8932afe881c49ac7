"""What nowcasts cost on a machine: ``hf-nino bench engine``."""
