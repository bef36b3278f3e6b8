"""One file per verb: each joins the rooms into what the user asked for and records the result."""
