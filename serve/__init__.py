"""A trained bundle in; an HTTP service that answers as the bundle was evaluated out.

`serve run serve.app:build bundle=runs/quickstart/bundle` starts it with Ray Serve. Inside this
package Ray Serve is imported as `ray_serve`, since the package bears the same name.
"""
