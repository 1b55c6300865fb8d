"""Files of others, told by their contents; files of ours, which appear whole; names of files, checked."""
