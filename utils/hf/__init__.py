"""Other people's formats, in and out, and the places where files and models come from."""
