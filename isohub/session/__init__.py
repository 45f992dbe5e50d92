"""The caller's side of workers: zygotes, processes, deadlines, deaths, and the handles to what lives there."""
