"""How the sites of a profile are reached: started here in the background, over SSH, or let in when they dial."""
