"""Parts of the panel of the module GradProjIO: each connects some of its widgets with what they show."""
