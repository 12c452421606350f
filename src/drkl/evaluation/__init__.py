"""How faithful, how diverse and how confident a student is, next to its teacher."""
