"""HTTP routes: parse, authorise, call, render."""
