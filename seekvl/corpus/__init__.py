"""Making the data: pictures that are drawn, with questions whose answers are true by construction."""
