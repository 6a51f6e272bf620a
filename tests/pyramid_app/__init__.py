"""A small Pyramid application with zope.sqlalchemy, pyramid_tm and its transaction manager."""
