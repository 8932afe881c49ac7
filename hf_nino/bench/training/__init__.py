"""What nowcasts bring: tasks x methods x protocols x seeds, one JSON a run (``hf-nino bench``)."""
