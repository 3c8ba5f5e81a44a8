"""From files, folders and Hub ids to checked columns of text."""
