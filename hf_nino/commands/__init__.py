"""What the commands of ``hf-nino`` do, apart from reading their options."""
