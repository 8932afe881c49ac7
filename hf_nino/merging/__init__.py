"""Merging models that were fine-tuned from one base: with a nowcaster, by averaging, by task arithmetic."""

from __future__ import annotations

from .compare import as_markdown, compare_merges
from .folders import FolderMerge, merge_folders
from .models import merge_models
from .recipe import MergeRecipe

__all__ = ["FolderMerge", "MergeRecipe", "as_markdown", "compare_merges", "merge_folders", "merge_models"]
