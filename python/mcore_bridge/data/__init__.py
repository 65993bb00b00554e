"""From files to micro-batches: reading rows, chat templates, packing, order."""
