"""Engine of `gesso reproduce`: plan, run, measure and judge the tables and figures that gesso.papers defines."""
