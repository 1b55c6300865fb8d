"""What differs between model families: where their parts are, how they load, how a student follows from a teacher."""
